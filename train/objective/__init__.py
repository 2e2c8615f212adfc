"""What training minimizes: the losses of text and images, and the adversary that learns against them."""
