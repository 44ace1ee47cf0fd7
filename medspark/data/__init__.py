"""CT data: reading, the volume store, crops, labelled tasks and phantoms."""
