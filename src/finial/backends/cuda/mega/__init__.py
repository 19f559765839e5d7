"""The persistent megakernel: whole decode steps of a whole model in one launch.

`shape.py` recognises the graphs it runs, `layout.py` says where rows, counters and vectors lie, `room.py` what shared
memory holds, `table.py` which block does what and waits for whom, `plan.py` fits that to a device, `check.py` proves
it, `stream.py` puts the weights into the order in which blocks read them, `program.py` runs steps.  See
docs/megakernel.md.
"""
