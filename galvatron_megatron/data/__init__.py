"""Data files of the package: measured runs and the test beds they were made on."""
