"""An offloaded model: its sparse layers, its plan, its caches and its handle."""
