"""What a user types: the commands, and what they print."""
