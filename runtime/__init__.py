"""What a run needs besides the algorithm: options, rows, folder, processes, plan."""
