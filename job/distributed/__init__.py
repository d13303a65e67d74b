"""Several processes as one run.

`ranks` determines rank and world size, `launcher` starts the processes of a machine, `rendezvous` connects them,
`processes` is the interface that stages use, and `process_group` implements it with a TCPStore and all-reduce.
"""
