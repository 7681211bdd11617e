"""Where gate, up and down live in each architecture, and the torch modules that replace them."""
