"""Triton kernels of pyvtk, installed as pyvtk.triton_kernels."""
