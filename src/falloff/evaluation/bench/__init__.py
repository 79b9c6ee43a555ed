"""Speed, measured so that it cannot flatter: attention kernels, and whole transformers of true size.

Every ratio is over the fastest dense arm that can run, arms are interleaved in one process, and what cannot run is
named with its reason instead of a number.
"""
