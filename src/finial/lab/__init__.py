"""The lab: any engine, the same work, a verdict beside every number.

Workloads × engines × probes → records → reports.  An engine is a process of its own that speaks JSON lines
(docs/lab-protocol.md); the lab knows finial's engine only so, and imports below itself only what describes the work:
the graph, its cost, and the machine.

    finial bench
"""
