"""Measured claims, one command each (see the Makefile)."""
