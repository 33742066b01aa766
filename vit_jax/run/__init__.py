"""What a run is made of: the recipe made concrete, the folder it leaves, what it writes, signals, processes."""
