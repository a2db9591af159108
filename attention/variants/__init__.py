"""One file a variant; the table is ``attention.VARIANTS``."""
