"""Times of a model's parts and of the links, taken as stages run them."""
