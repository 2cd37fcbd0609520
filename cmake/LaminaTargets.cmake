# One place for the flags that every target of ours gets. Generated code does not get them.

add_library(lamina_flags INTERFACE)
target_compile_options(lamina_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor -Wold-style-cast
                            -Woverloaded-virtual -Wimplicit-fallthrough -Werror
                            # Args structs leave optional members to their defaults.
                            -Wno-missing-field-initializers>)
if(LAMINA_SANITIZE)
  # -O2 -g and the vptr check, of little use without casts down a hierarchy, make a file's compilation take three times
  # as long.
  set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O1 -g1 -DNDEBUG")
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${LAMINA_SANITIZE}>
                      $<$<COMPILE_LANGUAGE:CXX>:-fno-sanitize=vptr>
                      $<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer>)
  add_link_options(-fsanitize=${LAMINA_SANITIZE})
endif()
if(LAMINA_FUZZ)
  # libFuzzer sees which edges of the daemon's code an input reaches. What clang warns of where GCC does not is shown.
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fsanitize=fuzzer-no-link>)
  target_compile_options(lamina_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wno-error>)
endif()

# lamina_library(NAME SOURCES ... [PUBLIC libs...] [PRIVATE libs...]): a static library, one per room.
function(lamina_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;PUBLIC;PRIVATE" ${ARGN})
  add_library(${name} STATIC ${ARG_SOURCES})
  target_link_libraries(${name} PUBLIC ${ARG_PUBLIC} PRIVATE lamina_flags ${ARG_PRIVATE})
endfunction()

# Where no speed is needed, the compiler's time is worth more: to be linked by tests and command line tools.
add_library(lamina_quick_to_build INTERFACE)
target_compile_options(lamina_quick_to_build INTERFACE
  $<$<AND:$<CONFIG:Release>,$<COMPILE_LANGUAGE:CXX>>:-O1>)
if(LAMINA_SANITIZE AND NOT LAMINA_FUZZ)
  target_compile_options(lamina_quick_to_build INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-O0>)
endif()

# lamina_quick_under_sanitizers(NAME): for a library that computes little: sanitizers' builds are compiled for the run
# of the tests alone, and optimizing such a room takes as long as all else of its compilation.
function(lamina_quick_under_sanitizers name)
  if(LAMINA_SANITIZE AND NOT LAMINA_FUZZ)
    target_compile_options(${name} PRIVATE -O0)
  endif()
endfunction()

# lamina_fast_under_sanitizers(NAME): for a library that tests alone use and that is most of their time: its memory
# is checked, its arithmetic is not, as in the tests' own code.
function(lamina_fast_under_sanitizers name)
  if(LAMINA_SANITIZE)
    target_compile_options(${name} PRIVATE -O2)
  endif()
  if(LAMINA_SANITIZE MATCHES undefined)
    target_compile_options(${name} PRIVATE -fno-sanitize=undefined)
  endif()
endfunction()

# lamina_test(NAME LABELS "unit;op" SOURCES ... LIBS ...): a GoogleTest binary registered with CTest.
function(lamina_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "LABELS;SOURCES;LIBS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE lamina_flags lamina_quick_to_build ${ARG_LIBS} GTest::gmock GTest::gtest_main)
  if(LAMINA_SANITIZE MATCHES undefined)
    # What is tested is checked for it; checking the tests' own code doubles their time to compile.
    target_compile_options(${name} PRIVATE -fno-sanitize=undefined)
  endif()
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT})
endfunction()
