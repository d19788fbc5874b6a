"""An offloaded model: its sparse layers, plan, caches and handle."""
