"""Measurements of pcoherence: every number of the README comes from here."""
