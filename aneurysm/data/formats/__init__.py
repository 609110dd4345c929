"""Volume files: NIfTI, Analyze, MetaImage, NRRD."""
