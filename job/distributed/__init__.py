"""Several processes as one run.

`ranks` determines rank and world size, `launcher` starts the processes of a machine, `rendezvous` connects them, and
`early_end` informs the others of a machine that ends before. `processes` is the interface that stages use, and
`process_group` implements it with a TCPStore and all-reduce.
"""
