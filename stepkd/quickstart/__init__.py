"""The quick start: every method of stepkd on tiny models, on this machine, with nothing to download.

It is a list of stages (:data:`~stepkd.quickstart.stages.STAGES`). A stage trains or measures something, leaves its
files in a folder of its own, and adds one section to ``summary.json``. A new method adds one stage.
"""
