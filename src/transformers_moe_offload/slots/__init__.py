"""Where experts are used: numbered places that hold one each, and what brings experts into them."""
