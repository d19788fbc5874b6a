"""What is resident, and what must move."""
