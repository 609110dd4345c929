"""Blood flow as a regulariser: a coordinate network that has to carry blood through the segmented lumen."""
