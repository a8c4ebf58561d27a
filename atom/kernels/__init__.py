"""Ops: their mathematics, a torch reference each, and the implementations that may run them on a device."""
