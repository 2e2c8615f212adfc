"""What a recipe will do, said before it is done: parameters, memory, time, and a batch as the model sees it."""
