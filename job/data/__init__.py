"""From files to tokens: rows, schemas, tokenization, and which examples a step trains on."""
