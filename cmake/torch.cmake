# Target torch_stable: torch's headers and libtorch_cpu.so, found by path. find_package(Torch) would
# bring CUDA in, and link it.
execute_process(
  COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/build_support/find_torch.py
  OUTPUT_VARIABLE MLA_FP8_TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
message(STATUS "torch: ${MLA_FP8_TORCH_DIR}")

# The oldest torch that the package accepts is the one whose stable ABI is compiled for; a newer
# function is a compile error.
file(STRINGS pyproject.toml requirement REGEX "\"torch>=[0-9]+\\.[0-9]+\"")
string(REGEX MATCH "torch>=([0-9]+)\\.([0-9]+)" requirement "${requirement}")
math(EXPR target_version "(${CMAKE_MATCH_1} << 56) | (${CMAKE_MATCH_2} << 48)" OUTPUT_FORMAT HEXADECIMAL)

add_library(torch_stable INTERFACE)
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=${target_version})
target_include_directories(torch_stable SYSTEM INTERFACE ${MLA_FP8_TORCH_DIR}/include)
target_link_libraries(torch_stable INTERFACE ${MLA_FP8_TORCH_DIR}/lib/libtorch_cpu.so)
