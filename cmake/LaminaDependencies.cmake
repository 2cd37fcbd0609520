# Every outside library, all of them Debian 12 packages (scripts/setup installs them).
# Protobuf ships no CMake config there: module mode, before gRPC's config asks for it.
find_package(Threads REQUIRED)
find_package(OpenMP REQUIRED COMPONENTS CXX)
find_package(absl CONFIG REQUIRED)
find_package(Protobuf 3.21 MODULE REQUIRED)
find_package(gRPC CONFIG REQUIRED)
find_package(civetweb CONFIG REQUIRED)
find_package(prometheus-cpp CONFIG REQUIRED)
find_package(CLI11 CONFIG REQUIRED)
find_package(nlohmann_json CONFIG REQUIRED)
find_package(spdlog CONFIG REQUIRED)
find_package(OpenSSL REQUIRED COMPONENTS Crypto)
# Debian's dnnl config insists on OpenCL, which its CPU engine does not need: find the library itself.
find_path(LAMINA_DNNL_INCLUDE oneapi/dnnl/dnnl.hpp REQUIRED)
find_library(LAMINA_DNNL_LIBRARY dnnl REQUIRED)
mark_as_advanced(LAMINA_DNNL_INCLUDE LAMINA_DNNL_LIBRARY)
if(NOT TARGET DNNL::dnnl)
  add_library(DNNL::dnnl SHARED IMPORTED)
  set_target_properties(DNNL::dnnl PROPERTIES IMPORTED_LOCATION "${LAMINA_DNNL_LIBRARY}"
                                              INTERFACE_INCLUDE_DIRECTORIES "${LAMINA_DNNL_INCLUDE}")
endif()
if(LAMINA_TESTS)
  find_package(GTest CONFIG REQUIRED)
  find_package(benchmark CONFIG REQUIRED)
endif()
if(LAMINA_CUDA)
  # sm_90a: wgmma and setmaxnreg are Hopper's own.
  set(CMAKE_CUDA_ARCHITECTURES 90a-real)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  # The toolkit's usual place is searched too: its installers don't put it on the PATH.
  if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    find_program(LAMINA_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda
                 PATH_SUFFIXES bin)
    if(LAMINA_NVCC)
      set(CMAKE_CUDA_COMPILER ${LAMINA_NVCC})
    endif()
  endif()
  enable_language(CUDA)
  # Where a project needs CMake 3.25, the module of 3.25 marks CUDA::nvToolsExt as outdated, and fails with CUDA 13,
  # which has no such library any more.
  set(needed ${CMAKE_MINIMUM_REQUIRED_VERSION})
  set(CMAKE_MINIMUM_REQUIRED_VERSION 3.24)
  find_package(CUDAToolkit 12.4 REQUIRED)
  set(CMAKE_MINIMUM_REQUIRED_VERSION ${needed})
endif()
