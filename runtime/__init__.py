"""Executes launch bundles. Imports nothing here, so that `trainwright.runtime.manifest` stays cheap for the compiler."""
