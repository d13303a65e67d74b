"""Several processes as one run.

`ranks` finds out which process this is, `launcher` starts the processes of a machine, `rendezvous` connects them, and
`early_end` tells the others of a machine that ends before. `processes` is what a stage may ask of them, and
`process_group` does it over a TCPStore and all-reduce.
"""
