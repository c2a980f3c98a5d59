"""What works on whole models: conversion, pruning, measurement, training."""
