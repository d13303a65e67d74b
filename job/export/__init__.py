"""Export: the trained model in other formats than the adapter. `formats` lists them and says how to add one."""
