"""Object stores behind one protocol, and the Hugging Face Hub."""
