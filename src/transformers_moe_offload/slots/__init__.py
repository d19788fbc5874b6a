"""Where experts are used: numbered places that hold one each, and how experts are loaded into them."""
