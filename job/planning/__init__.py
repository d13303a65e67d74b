"""What a run will take (tokens, steps, memory, hours, money), before a GPU is paid for."""
