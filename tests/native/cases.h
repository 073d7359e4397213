// What the small cases of cases.cpp check against plain C++ (simd_cases.cpp). Both throw std::runtime_error.
#pragma once

void conversions();       // of bf16 and f16 from and to memory: every number, every border of rounding
void vector_functions();  // the error bounds of simd_math.h, and the operations of simd.h
