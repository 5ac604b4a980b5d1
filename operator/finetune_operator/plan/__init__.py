"""What should happen next to a FineTuneJob: pure functions, one file for each policy.

``plan.plan`` is the whole of it. Nothing here reads a clock, waits, or talks to anything: ``now`` is an argument, and
the cluster's controller and the local runner are two thin shells that do what the ``Plan`` says.
"""
