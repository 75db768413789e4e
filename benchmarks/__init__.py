"""What pyvtk is measured by: cases in bench_<family>.py, one harness for all. Run with ``python -m pyvtk bench``."""
