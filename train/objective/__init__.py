"""What training minimizes: the losses of text and pictures, and the adversary that learns against them."""
