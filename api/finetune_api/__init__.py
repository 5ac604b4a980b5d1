"""The words everyone speaks: FineTuneJob's spec and status, and what a stage is given and leaves behind.

Pure: pydantic models and functions over them, no input or output, nothing of ours imported.
"""
