"""What is wrong with a data set, case by case: run `python -m aneurysm.check <root>`."""
