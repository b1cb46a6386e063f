"""Rows of the catalog: what each op takes, and the cases it is checked on."""
