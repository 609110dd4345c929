"""A five-stage detector of intracranial aneurysms in 3D head CTA, MRA, T1 and T2 scans."""

__version__ = "0.1.0"
