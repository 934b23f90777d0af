"""HTML pages of datasets, evaluations, sweeps and meshes."""
