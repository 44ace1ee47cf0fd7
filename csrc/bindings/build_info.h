// What the compiled module can say of itself: build options and the processor it runs on.
#pragma once

#include <pybind11/pybind11.h>

// Adds build_info() and cpu_features() to the module.
void bind_build_info(pybind11::module_& m);
