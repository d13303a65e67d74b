"""Several processes as one run.

`ranks` finds out which process this is, `launcher` starts the processes of a machine, `rendezvous` connects them,
`processes` is what a stage may ask of them, and `process_group` does it over a TCPStore and all-reduce.
"""
