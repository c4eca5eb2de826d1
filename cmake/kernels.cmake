# Compiles each csrc/kernels/<architecture>/<op>.cu to a fatbin and embeds it. Without nvcc the
# table is empty, and NVRTC compiles the installed sources at first use. CMake's own CUDA language
# would look for a toolkit, a runtime library and a device linker: none is needed.
set(MLA_FP8_OLDEST_NVCC 12.3)
set(MLA_FP8_ARCHITECTURES 90a)  # as nvcc names them; the sources for sm_90a are in folder sm90

# Sets NVCC in the caller: what MLA_FP8_NVCC asks for, or "".
function(mla_fp8_find_nvcc)
  set(NVCC "" PARENT_SCOPE)
  set(nvcc ${MLA_FP8_NVCC})
  if(MLA_FP8_NVCC STREQUAL "AUTO")
    set(nvcc $ENV{CUDACXX})
    if(NOT nvcc)
      get_filename_component(site_packages ${MLA_FP8_TORCH_DIR} DIRECTORY)
      # Where the nvidia-cuda-nvcc wheels put it.
      file(GLOB pip_directories ${site_packages}/nvidia/cu*/bin)
      find_program(nvcc_program nvcc NO_CACHE HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin
                   PATHS ${pip_directories} /usr/local/cuda/bin)
      set(nvcc ${nvcc_program})
    endif()
  endif()
  if(NOT nvcc)
    message(STATUS "nvcc: none; NVRTC will compile the kernels")
    return()
  endif()
  execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE version ERROR_VARIABLE version RESULT_VARIABLE failed)
  string(REGEX MATCH "release ([0-9.]+)" release "${version}")
  if(NOT failed AND CMAKE_MATCH_1 VERSION_GREATER_EQUAL MLA_FP8_OLDEST_NVCC)
    message(STATUS "nvcc: ${nvcc} (${CMAKE_MATCH_1})")
    set(NVCC ${nvcc} PARENT_SCOPE)
  elseif(MLA_FP8_NVCC STREQUAL "AUTO")
    message(WARNING "nvcc: ${nvcc} is not ${MLA_FP8_OLDEST_NVCC} or newer (${release}); NVRTC will compile the kernels")
  else()
    message(FATAL_ERROR "MLA_FP8_NVCC must be an nvcc of CUDA ${MLA_FP8_OLDEST_NVCC} or newer, got ${nvcc} (${release})")
  endif()
endfunction()

# Adds mla_fp8_embedded_image() to `target`; the other arguments are the ops.
function(mla_fp8_embed_kernels target)
  mla_fp8_find_nvcc()
  set(EMBEDDED "")
  set(IMAGES "")
  set(fatbins "")
  if(NVCC)
    foreach(architecture IN LISTS MLA_FP8_ARCHITECTURES)
      string(REGEX MATCH "[0-9]+" capability ${architecture})
      foreach(op IN LISTS ARGN)
        set(image sm${capability}/${op})
        string(MAKE_C_IDENTIFIER ${image} symbol)
        set(source ${CMAKE_CURRENT_SOURCE_DIR}/csrc/kernels/${image}.cu)
        set(fatbin ${CMAKE_CURRENT_BINARY_DIR}/${symbol}.fatbin)
        add_custom_command(
          OUTPUT ${fatbin}
          COMMAND ${NVCC} -fatbin -gencode=arch=compute_${architecture},code=sm_${architecture} -O3 -std=c++17
                  -ccbin ${CMAKE_CXX_COMPILER} -I${CMAKE_CURRENT_SOURCE_DIR}/csrc -MD -MF ${fatbin}.d -o ${fatbin}
                  ${source} -Werror all-warnings -Xptxas --warn-on-spills,--warning-as-error
          DEPENDS ${source}
          DEPFILE ${fatbin}.d
          COMMENT "Compiling kernels ${symbol}.fatbin"
          VERBATIM)
        list(APPEND fatbins ${fatbin})
        string(APPEND EMBEDDED "MLA_FP8_EMBED(${symbol}, \"${fatbin}\");\n")
        string(APPEND IMAGES "{\"${image}\", MLA_FP8_IMAGE(${symbol})}, ")
      endforeach()
    endforeach()
  endif()
  set(images ${CMAKE_CURRENT_BINARY_DIR}/embedded_images.cpp)
  configure_file(${CMAKE_CURRENT_SOURCE_DIR}/cmake/embedded_images.cpp.in ${images} @ONLY)
  set_source_files_properties(${images} PROPERTIES OBJECT_DEPENDS "${fatbins}")
  target_sources(${target} PRIVATE ${images})
endfunction()
