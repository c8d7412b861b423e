// Memory of tensors on CPUs from here on: cpu_memory.cpp.
#pragma once

void use_cpu_memory();
