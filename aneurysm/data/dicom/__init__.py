"""DICOM series to scans: headers, geometry, pixels, units."""
