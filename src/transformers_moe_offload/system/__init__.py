"""What the operating system gives and takes: memory, and processes that fork. It knows no files and no experts."""
