"""Read scans with a trained bundle: python predict.py bundle=<dir> input=<scan or folder> output=<dir>"""

from aneurysm.predict import main

if __name__ == "__main__":
    main()
