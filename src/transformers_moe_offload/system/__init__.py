"""The operating system: free memory, page-locked and aligned memory, processes that fork. Without files or experts."""
