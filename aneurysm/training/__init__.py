"""How each stage is trained in its run folder, and what it leaves there for the next one.

Every stage trains one fold and writes products for the patients that fold held out. Later stages read the
products of all folds, so nothing they learn from was predicted by a model that had seen the patient.
"""
